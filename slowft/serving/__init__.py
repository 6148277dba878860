"""Serves models over HTTP as OpenAI does: a streamed model, its adapters, an emulated one, or another server behind it.

`server` takes requests, `guard` says which may come in, `upstream` passes them on, `local` answers them by
`scheduler`'s passes over the weights, `recorder` writes down what was asked and answered, `pages` is for a browser.
"""
