"""Regulated Chinese verse."""
