"""LazyLLM (arXiv 2407.14057): prompt tokens that do not matter stop flowing.

Paper and code, section 3 of the paper:

| paper | here |
|---|---|
| pruning layer l | the last layer of a span |
| s_i, importance of token i at l (equation 1) | `importance.attention_paid` |
| k_l-th percentile | `Schedule.keep`: of what may be pruned, the share that runs on |
| Aux Cache | `aux_cache.AuxCache`, one entry per token instead of one per token and layer |

What differs: single tokens, once pruned, stay away; where pages are kept or pruned
together, they come back. A decode step runs on the choice that the step before made. A
token once brought back to a layer stays in its KV cache and is seen by all that come after
it.
"""
