"""The census: tiny random models of all of transformers' model types, patched and compared with what they were."""
