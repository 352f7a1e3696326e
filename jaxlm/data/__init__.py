"""From text to batches: rows of text -> documents -> tokens on disk -> examples -> packed rows -> `batch_at(step)`."""
