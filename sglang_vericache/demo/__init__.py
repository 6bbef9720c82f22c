"""The demo: one small model, two CPU servers, the same requests, and a comparison."""


class DemoError(RuntimeError):
    """The demo cannot go on; the message is the sentence that the user reads."""
