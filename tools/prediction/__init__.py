"""What tools/predict.py is made of: the pictures that are asked about, their features, answers and their look."""
