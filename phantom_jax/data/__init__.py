"""From raw images and text to batches: records, conversations, tiles, rows."""
