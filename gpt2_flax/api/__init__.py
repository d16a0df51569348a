"""What Python programs call. `gpt2_flax` imports it at the first use of a name; docs/python-api.md is made from it."""
