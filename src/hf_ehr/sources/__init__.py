"""Raw tables → EVENTS: one file per source, one public function each."""
