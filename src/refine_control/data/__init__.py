"""Pictures, captions, masks and controls: from the disk to arrays. Nothing heavy is imported here."""
