"""`vpt app`: a page on which people see a model look twice.

Starlette and uvicorn carry it, and three hand-written files are all that a browser gets: nothing is built or fetched
from elsewhere, every element can be named for a screen reader, and the boxes, the crops and the stages of a live answer
are ours to draw. Gradio would bring its own front end (tens of megabytes, fonts and analytics switched off by
environment variables), and its queue cannot stop a generator between two tokens.

    server      routes: JSON in, JSON lines out           guard    who may speak to it at all
    sessions    what one visitor has: pictures, branches  line     the queue before the one model
    turns       what is asked of the engine, and told     pictures uploads and examples
"""
