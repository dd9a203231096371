"""From a published data set to batches: importers, records on disk, row layout, loader."""
