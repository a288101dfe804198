"""torch: workarounds, and uses of its private names. They know nothing of hf_tpsp, and every room may use them."""
