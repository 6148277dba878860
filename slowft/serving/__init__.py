"""Serves models over HTTP as OpenAI does: a streamed model, its adapters, an emulated model, or another server's.

`server` takes requests, `guard` decides which may come in, `upstream` passes them on, `local` answers them by passes of
`scheduler` over the weights, `recorder` writes down requests and answers, and `pages` is for a browser.
"""
