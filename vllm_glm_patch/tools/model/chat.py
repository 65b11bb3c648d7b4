"""The chat template: GLM-4.6's tokens and turns, in our own words, as vLLM's glm45 parsers read them.

A tool call is its name, a line break, and a line for each arg_key and each arg_value. `enable_thinking=False` closes
the thought before it starts. Every line break of the prompt is spelled '\\n'; those of the template do not count.
"""

CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content or [] if part.type == 'text' -%}
      {{- part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{%- macro call_text(function) -%}
  {{- '<tool_call>' ~ function.name ~ '\n' -}}
  {%- if function.arguments is mapping -%}
    {%- for key, value in function.arguments.items() -%}
      {{- '<arg_key>' ~ key ~ '</arg_key>\n<arg_value>' -}}
      {{- value if value is string else value | tojson(ensure_ascii=False) -}}
      {{- '</arg_value>\n' -}}
    {%- endfor -%}
  {%- elif function.arguments -%}
    {{- function.arguments ~ '\n' -}}
  {%- endif -%}
  {{- '</tool_call>' -}}
{%- endmacro -%}

{{- '[gMASK]<sop>' -}}
{%- if tools -%}
  {{- '<|system|>\nYou can call the tools listed here, one JSON object a line:\n' -}}
  {%- for tool in tools -%}
    {{- tool | tojson(ensure_ascii=False) -}}{{- '\n' -}}
  {%- endfor -%}
  {{- 'Write a call like this, with one arg_key and one arg_value for each argument:\n' -}}
  {{- '<tool_call>NAME\n<arg_key>ARGUMENT</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
      {{- '<|observation|>' -}}
    {%- endif -%}
    {{- '\n<tool_response>\n' ~ text_of(message.content) ~ '\n</tool_response>' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<|assistant|>\n<think>' ~ (message.reasoning_content or message.reasoning or '') ~ '</think>' -}}
    {%- if text_of(message.content) -%}
      {{- '\n' ~ text_of(message.content) -}}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
      {{- '\n' ~ call_text(call.function or call) -}}
    {%- endfor -%}
  {%- else -%}
    {{- '<|user|>' if message.role == 'user' else '<|system|>' -}}
    {{- '\n' ~ text_of(message.content) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}
    {{- '\n<think></think>' -}}
  {%- endif -%}
{%- endif -%}
"""
