"""The ground floor: errors, files, ranks, pages and outlines. Nothing here imports another part of the package."""
