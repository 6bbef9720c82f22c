"""Who drafts, who verifies, who is decoded plainly in a scheduler step."""
