"""Files that several subpackages write or read: names in a run's folder, locks, checksums, text."""
