"""The target model over the draft view."""
