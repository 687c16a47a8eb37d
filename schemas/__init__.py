"""What crosses a boundary: the wire format, shard markers, configuration and errors. No torch, no
ray."""
