"""A bundle behind HTTP: OpenAI's API, a web page, metrics. Protocol on one side, the engine on the other, no runtime logic between.

settings       what the command line decides
access         keys, and whose turn a request counts against
bodies         what a request's body may hold; body_options what it asks for
chat_messages  messages to a prompt in the bundle's own form
remote_media   data: URLs, and remote media from an allow-list
models         the models that are served, and their exchange
answers        outcomes to OpenAI's objects, whole or as a stream
refusals       errors in OpenAI's form
metrics        Prometheus
tracing        OpenTelemetry
transport      bodies and streams, and clients that are slow or gone
routes         paths to the above; app puts them together
process        signals, logs, drain
from_file      many requests from a file: file_lines what a line asks for, file_answers its result
"""
