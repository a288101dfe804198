"""Every workaround for a defect of a library we stand on, and every use of what a library keeps private that is not everywhere, by
library, each with the condition on which it can be deleted. `tests/upstream/` shows for each that it is still needed.

    torch/                             its files know nothing of hf_tpsp, and every room may use them
    accelerate, transformers, peft     the library of that name
    install                            what `enable()` puts in place; the rest is called where it is needed
    versions                           what is installed, and what the suite was run on
"""
