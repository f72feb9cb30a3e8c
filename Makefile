# Thin names for ./dev, which sets everything up by itself.
.PHONY: build test lint bench demo
build test lint bench demo:
	./dev $@ $(ARGS)
