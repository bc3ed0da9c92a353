"""Inside vision towers, by structure: where they are, which patches make a visual token, what to cut, what follows."""
