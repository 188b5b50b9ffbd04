"""Per-sample squares on a GPU, against the plain gradient: ``python -m bench.per_sample``.

``linear`` times the fused kernel of a linear layer's weight, and other ways to the same squares,
against the gradient alone; ``training`` times steps of a GPT with statistics against steps without.
Whatever is compared runs in turn within one process, and has been compared in its results first.
"""

PARTS = ("linear", "training")
