# Thin names for ./dev, which sets everything up by itself.
.PHONY: build test chaos soak fuzz lint bench demo
build test chaos soak fuzz lint bench demo:
	./dev $@ $(ARGS)
