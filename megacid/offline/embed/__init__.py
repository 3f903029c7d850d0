"""Embed shards with the teacher."""
