"""Streams of pairs from commands that write tars (`pipe:`), which are never indexed."""
