"""Spans on SGLang's radix tree, and the draft views made of them."""
