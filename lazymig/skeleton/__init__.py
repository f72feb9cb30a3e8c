"""The destination process under construction: keeper, husk, courier and memory."""
