"""A bundle behind HTTP: OpenAI's API, a web page, metrics. Protocol on one side, the engine on the other, no runtime logic between.

settings    what the command line decides
access      keys, and whose turn a request counts against
bodies      what a request's body may hold
chat        messages to a prompt in the bundle's own form
media       data: URLs, and remote media from an allow-list
models      the models that are served, and their exchange
answers     outcomes to OpenAI's objects, whole or as a stream
metrics     Prometheus
routes      paths to the above; app puts them together
process     signals, logs, drain
"""
