"""Conversations, rendered by the chat templates of tokenizers.

conversations     the forms in which conversations come
rendering         conversations to text and to ids
tokens            ids in which no character of a user becomes part of a control token
template_process  the process that renders templates, seen from outside
template_worker   the same, seen from inside
template_sandbox  the Jinja environment of templates
template_text     strings that remember which characters a user wrote
"""
