"""Recorded run lengths in place of real acceptance, for shapes without weights."""
