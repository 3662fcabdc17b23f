"""Several ranks: groups that share a copy of the parameters, collectives on objects, errors."""
