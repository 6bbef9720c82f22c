"""What a model gains on a card, by arithmetic: no GPU, no SGLang."""
