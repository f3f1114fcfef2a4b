"""Other ways to turn a model at inference time, measured as vectors are: by the rates of stored responses."""
