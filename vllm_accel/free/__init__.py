"""FREE (arXiv 2310.05424): the model's own first layers draft, its deep layers catch up.

Written from the paper and from notes on its published behaviour; no code was taken.

| paper | here |
|---|---|
| L_S, L_D: depth of the shallow and of the deep model | `exit_layer`, `num_layers` |
| shallow-deep module | `exit_head.ExitHead` on the state after `exit_layer` layers |
| confidence: best probability less the second | `exit_head.ExitSignals.confidence` |
| lambda; a token exits if its confidence is above | `threshold` |
| stack of early-exited tokens, synchronized parallel decoding | `stack.ExitStacks` |
| adaptive threshold estimator | `gating.beta_mixture`, fed by `stack.Seen` |
"""
