"""What SGLang's CPU engine lacks."""
