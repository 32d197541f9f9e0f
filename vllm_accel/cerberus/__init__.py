"""Cerberus (arXiv 2410.13344): parallel draft heads with cross-links.

| paper | here |
|---|---|
| head i | row i of every tensor with a leading `heads` dimension |
| h_i^(j), hidden state of head i after block j | `states[i]` after the j-th block |
| block, concat(h_i^(j-1), h_{i-1}^(j-1)) | `CerberusHeads.forward` |
"""
