"""The workarounds for defects of the libraries that hf_tpsp uses, and the uses of their private names, except those
that occur everywhere. Each says on which condition it can be deleted. `tests/upstream/` shows that each is still
needed.

    torch/                             its files know nothing of hf_tpsp, and every room may use them
    accelerate, transformers, peft     the library of that name
    install                            what `enable()` puts in place; the rest is called where it is needed
    versions                           what is installed, and what the suite was run on
"""
