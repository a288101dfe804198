"""Every workaround for a defect of a library we stand on, and every use of what a library keeps private that is not everywhere, by
library, each with the condition on which it can be deleted. `tests/upstream/` shows for each that it is still needed.

    autograd, c10d, dtensor, fake, fsdp2    torch; they know nothing of hf_tpsp
    accelerate, transformers, peft          the library of that name
    patching                                how something is put in place, and taken back
    install                                 what `enable()` puts in place; the rest is called where it is needed
"""
