"""The other preference losses of --loss, and the add-ons that combine with a loss."""
