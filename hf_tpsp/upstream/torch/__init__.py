"""torch: workarounds, and what it keeps private. They know nothing of hf_tpsp, and every room may use them."""
