"""From files on disk to batches: formats, index, order, transforms, decoding, rendering, loading."""
