"""Texts that tokenizers disagree about."""

SCRIPTS = (
    "The quick brown fox, it's 3 o'clock; they'LL say WE'VE won.",
    "Größenwahn über Straßenfußböden, naïve façade, coöperate, Ångström, señor",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "日本語のテキストと漢字、カタカナ、ひらがな。",
    "我能吞下玻璃而不伤身体。中文，测试！",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा १२३",
    "আমি কাঁচ খেতে পারি, তাতে আমার কোনো ক্ষতি হয় না।",
    "நான் கண்ணாடி சாப்பிடுவேன்",
    "నేను గాజు తినగలను",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ",
    "ຂ້ອຍກິນແກ້ວໄດ້",
    "ជំរាបសួរ ពិភពលោក",
    "မြန်မာစာ စမ်းသပ်မှု",
    "Կրնամ ապակի ուտել և ինծի անհանգիստ չըներ։",
    "მინას ვჭამ და არა მტკივა.",
    "ሰማይ አይታረስ ንጉሥ አይከሰስ።",
    "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ ᏣᎳᎩ ǅǈ ﬁﬂ",
    "Tôi có thể ăn thủy tinh mà không hại gì.",
)
CODE = (
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    'for(int i=0;i<10;++i){printf("%d\\n",a[i]);}\t// tabs\tand\ttabs\n\n\n',
    "SELECT * FROM t WHERE x='it''s' AND y>=1e-10;--comment",
    '<div class="a-b_c">&nbsp;<!-- x --></div></s><s>',
    "\\begin{align}x^2+\\frac{1}{2}&=\\sum_{i=0}^{n}i\\\\\\end{align}",
    "C:\\Users\\x\\AppData\r\nhttps://example.com/a?b=c&d=%20#e",
    '```python\nprint(f"{x!r:>{width}}")\n```',
    '#!/bin/sh\nset -euo pipefail; [[ -f "$1" ]] && exit 0 || :',
)
DIGITS = (
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F 1e9 1st 2nd",
    "2026-11-30T21:00:00Z +49(0)123/45-67 ½ ² ³ Ⅷ ① ٣ ๓ 一二三",
    "a1b22c333d4444 v1.2.3-rc4 10%20%30",
)
SYMBOLS = (
    "👋🏽👨‍👩‍👧‍👦🇩🇪🏴‍☠️ é é ñ à ​zero‌width‍ \ufeffbom",
    "…—–‘’“”«»„‚!!!???...;;;:::---___===+++***~~~^^^|||",
    "α→β ∀x∈ℝ: ⌈x⌉ ≥ x ≠ ∞ ± √2 €£¥₿ ©®™",
    "it's IT'S don'T I'm you're he'll I'd we've 's 'S 'x ''",
)
SPACES = (
    "",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "a  b   c    d     e\t\tf\n\ng \n h\n \n\ni\r\n\r\nj\x0bk\u00a0l\u2003m\u3000n",
    "\n",
    "\n\n\n",
    "\t",
    " \n \t \n",
    " " * 40 + "x" + " " * 17,
)
SPECIAL = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>x<|endoftext|> <|im_end|>y <|im_start|> z",
    "<|im_start |><|im_star|><im_end|>",
    "<start_of_turn>user\nHi<end_of_turn>\n<bos><eos> <unk><pad>",
    "<0x0A><0x41> ▁▁x ▁",
)
TEXTS = (*SCRIPTS, *CODE, *DIGITS, *SYMBOLS, *SPACES, *SPECIAL)
