"""Pictures to vectors, vectors to answers.

embed       into memory, or (`pipeline`, `parts`, `sources`, `columns`, `engines`) into parts on disk
index       what people search: a store with the fingerprint of the model that filled it (`making` builds it)
store       the seam for stores; `faiss_store` (`versions`, `building`, `blocks`, `choice`) and `lance_store` fit it
exact       every row looked at, in the layout this machine multiplies fastest
filters     conditions on metadata, one language for every store
exchange    clip-retrieval's folders, and .npy beside Parquet
groups      near duplicates and clusters;  sheet: results as one HTML page
"""
