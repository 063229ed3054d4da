"""From a source of images to pixels: listing, decoding, what is damaged, crops."""
