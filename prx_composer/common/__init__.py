"""The ground floor: errors, files, secrets, ranks and pages. Nothing here imports another part of the package."""
