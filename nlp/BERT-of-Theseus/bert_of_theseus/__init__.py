"""Compressing a BERT by module replacing (BERT-of-Theseus) on GLUE or on data of one's own, with and without DSKD."""
