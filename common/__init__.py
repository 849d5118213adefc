"""The DSKD method and what the NLP and the vision pipeline share; knows neither BERT nor ResNet."""
