"""Drafters that copy text: from the context, from reference documents, from a datastore."""
