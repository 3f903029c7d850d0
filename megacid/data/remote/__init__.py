"""Shards in object stores: access through fsspec, a cache of whole tars on a local disk, and fetching ahead."""
