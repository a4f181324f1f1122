"""What the offline teacher sees in a text: the table of cues with their weights, and what they are made of.

A cue speaks for one topology. It is a habit of speech (English or Chinese), or something counted: verbs of several
roles in a row, kinds of component, units after a numeral. `heuristic` weighs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

# Words of the work of each role, English and Chinese.
_WORK = {
    "planner": (
        r"plan|specs?|specification|design|decid\w+|choos\w+|pick|survey|research|propose|outline|list|map|settle"
        r"|agree|explore|work out|(?:write|writ\w+|note) (?:down|up)|find out|draw up|define|explain|recommend\w*"
        r"|sketch|weigh\w*|grammar",
        r"设计|方案|规划|调研|选型|定下|定稿|梳理|规格|选[出哪一]|为什么",
    ),
    "tester": (
        r"test(?:s|ed|ing)?|check\w*|verif\w+|validat\w+|measur\w+|benchmark\w*|profil\w+|reproduc\w+|audit\w*"
        r"|review\w*|confirm\w*|compar(?:e|ed|ing)|fuzz\w*|capture|record|snapshots?|characteri[sz]e|pin|prove[nd]?"
        r"|inspect\w*|examin\w+",
        r"测试|验证|验收|压测|复现|对比|检查|核对|快照|评审|审查|量出|用例|回归|验一|溢出",
    ),
    "refractor": (
        r"refactor\w*|restructur\w+|clean\w*|tid(?:y|ied)|simplif\w+|fold|merge|split|untangle|disentangle|flatten"
        r"|extract|rename|reorgani[sz]e|rewrite|collapse|pull|break|turn|swap|moderni[sz]e|consolidate|convert",
        r"重构|拆|整理|清理|收拢|改造|改写|改成|抽[出成]|合并|换成",
    ),
    "builder": (
        r"implement\w*|buil[dt]\w*|writ\w+|cod(?:e|ed|ing)|add\w*|fix\w*|create|mak(?:e|ing)|port|load|correct"
        r"|repair\w*|apply|put|migrate|generate|deploy|replace|patch|produce|ship|set up|move|dump|export|change"
        r"|update|translate|prototype",
        r"实现|写|做|修|改|加|搬|迁|接入|生成|部署|开发",
    ),
}
_ROLE_WORDS = {role: re.compile(rf"\b(?:{en})\b|{zh}", re.IGNORECASE) for role, (en, zh) in _WORK.items()}
_CLAUSE = re.compile(r"[.;:!?,]\s|[。；：，、！？]|\s(?:and|then)\s")
_LEAD = re.compile(
    r"(?:\s|first|then|next|finally|and|only|please|after which|afterwards|(?:once|when) \w+|,)*", re.IGNORECASE
)


def clauses(text: str) -> list[tuple[str | None, str | None]]:
    """Of each clause, the role whose work opens it, and the role whose work it names first."""
    found = []
    for clause in _CLAUSE.split(text):
        start = _LEAD.match(clause).end()  # type: ignore[union-attr]  # matches the empty text as well
        hits = [(hit.start(), role) for role, words in _ROLE_WORDS.items() if (hit := words.search(clause))]
        # Of equals the first of the table: "write down" is planning.
        at, role = min(hits, key=lambda hit: hit[0], default=(-1, None))
        found.append((role if at == start else None, role))
    return found


_COMPONENT = re.compile(
    r"\b(ios|android|web|desktop|front ?end|back ?end|server|client|gateway|cli|console|editor|loader|queue|scheduler"
    r"|relay|firmware|database|service|compiler|parser|renderer|extension|bot|updater|engine|runtime|worker|app)s?\b"
    r"|(前端|后端|网关|客户端|服务端|小程序|后台|固件|[\u4e00-\u9fff]{2}(?:服务|端))",
    re.IGNORECASE,
)


def _components(text: str) -> int:
    """How many kinds of interacting component the text names."""
    return len({(hit[0] or hit[1]).lower() for hit in _COMPONENT.findall(text)})


def longest_list(text: str) -> int:
    """The greatest number of short items (four words) standing in a row, separated by commas or `and`."""
    longest = 0
    for sentence in re.split(r"[.;:?!()]\s|[。；：？！（）\n]", text):
        run = 0
        if not re.search("[,，、]", sentence):
            continue
        for item in re.split(r", (?:and |or )?|[，、]| and | or |和", sentence):
            run = run + 1 if len(item.split()) <= 4 and len(item) <= 40 else 0
            longest = max(longest, run)
    return longest


@dataclass(frozen=True)
class Cue:
    """An observation: its name for the reason, the topology it speaks for, the weight a hit, how to count hits."""

    name: str
    topology: str
    weight: float
    most: int
    count: Callable[[str], int]


def _words(english: str, chinese: str) -> Callable[[str], int]:
    """Counts hits; the English alternatives are whole words."""
    pattern = re.compile(rf"\b(?:{english})\b|{chinese}", re.IGNORECASE)
    return lambda text: len(pattern.findall(text))


def _cue(name: str, topology: str, weight: float, most: int, english: str, chinese: str) -> Cue:
    return Cue(name, topology, weight, most, _words(english, chinese))


_NUMBER = (
    r"(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w{3,5}teen|(?:twenty|thirty|forty|fifty)(?:-\w+)?"
    r"|(?<![\w.,:-])(?:[3-9]|[1-9]\d))"
)
_MEASURE = (
    r"(?:seconds|minutes|hours|days|weeks|months|years|times|rows|lines|words|bytes|bits|digits|characters|columns"
    r"|cores|users|nodes|elements|entries|records|samples|points|levels|degrees|pixels|places|threads|values|cells"
    r"|runs|numbers)"
)
# What a stage leaves behind for the next one.
_PRODUCT = (
    r"(?:specs?|plan|notes?|list|write-up|document|paper|page|grammar|table|tests?|suite|cases?|snapshots?|goldens?"
    r"|baseline|profile|graph|trace|curve|figures|numbers|measurements?|report|survey|map|design|prototype|results?)"
)
# A tie between parts that is denied: it speaks for separate pieces, and must not be read as the tie itself.
_DENIED_ENGLISH = (
    r"(?:no|not|none|nothing|neither|never|nobody|without|\w+n't) (?!break)(?:[\w-]+ ){0,4}?(?:common|shared?|depends?"
    r"|imports?|links?|talking|agreed?|each other|one another|the others?|compared|merged)|shares? (?:no"
    r"|nothing)(?: \w+)?|independent(?:ly)? of (?:one another|each other|the others?)"
)
_DENIED_CHINESE = (
    r"互不[\u4e00-\u9fff]{2}|(?:没有?|不|无)[^，。；]{0,3}(?:依赖|共享|共用|关联|关系|统一|挨着|相干)|[彼互]此?相?独立"
)
DENIED = re.compile(rf"\b(?:{_DENIED_ENGLISH})\b|{_DENIED_CHINESE}", re.IGNORECASE)

_INDEPENDENT = _words(
    r"independent(?:ly)?(?=[.,;:)]|$| suspicions?)|unrelated|unconnected|separate(?:ly)?|stand-?alone|self-contained"
    r"|side by side|in isolation|in (?:any|whatever) order|by any(?:one|body)|whichever|whoever|one by one|(?:on|in"
    r"|at) (?:its|their) own",
    r"各自|分头|谁[写做改]都行|先[发上]哪个|哪个[^，。]{0,2}好了?|各[改跑写测查]|一家一|一人",
)

# fmt: off
CUES = (
    # -- one artefact
    _cue("one artefact", "single", 2.0, 1,
        r"(?:one|single|only the|only this|this) (?:[\w-]+ )?(?:file|function|script|query|statement|line|class"
        r"|method)|(?:write|need|want|give me|implement|add|create)(?: me| us)? (?:an?"
        r"|one) (?:[\w-]+ ){0,3}?(?:function|method|class|query|script|macro|snippet|decorator|hook|helper|trigger"
        r"|rule|dockerfile|makefile|program)|one-?liner|regex|formula",
        r"(?:写|给|来|要)[个一][条个份段组]?|只[动改要]|(?:函数|方法|脚本|正则)[：:，]",
    ),
    _cue("a signature or a place in the code", "single", 2.0, 1,
        r"\w+\([^()\n]{1,80}\)`? ?(?:->|:)|def \w+|lines? \d+|[\w/]{1,40}\.\w{1,4}:\d+|\w{1,40}(?:Error|Exception)",
        r"\w\([^()\n]{1,80}\) ?->|\w\(\w*\)\s?(?:里|的|会)|第 ?\d+ ?行",
    ),
    _cue("the contract of one function", "single", 1.0, 2,
        r"returns?|raises?|throws?|exit (?:code )?\d|std(?:in|out|err)|O\(.{1,20}|standard library|no (?:allocation"
        r"|recursion)|empty (?:string|list|input|array)|none|null|nan|in place",
        r"返回|抛出?|不许|为空|空串|时间复杂度",
    ),
    _cue("a question", "single", 1.5, 1,
        r"^(?:how|why|what|is|are|does|do|can|should|explain|which)|recommendation|two sentences",
        r"\?\s*$|为什么|[？吗呢][。]?\s*$|哪个？|是不是",
    ),
    _cue("nothing beyond it", "single", 1.0, 2,
        r"(?:leave|keep) [^.;]{1,40}(?:alone|as (?:it|they) (?:is|was|are))|no (?:patch|code|fix|changes?|redesign"
        r"|other \w+)|nothing (?:else|more)|contained fix|please|is (?:all|enough)|don't (?:need|touch|change)"
        r"|do not (?:touch|change)|just",
        r"就行|就好|即可|帮|别[动改]|不用[改动]",
    ),
    # -- stages, each eating the product of the one before
    Cue("verbs of several roles in a row", "chain", 1.5, 2,
        lambda text: len({role for role, _ in clauses(text) if role}) - 1),
    _cue("a stage waits for the one before", "chain", 2.0, 2,
        r"(?:when|once|after|until|as soon as) (?:it|that|this|these|those|they|the|all|nothing)(?: \w+){0,3}? (?:is"
        r"|are|has|have|stays?|match(?:es)?|holds?|pass(?:es)?|exists?)|only (?:then|when|after|from|against|once)"
        r"|once (?:complete|done|finished)|after (?:which|that)|afterwards|subsequently|followed by|finally|lastly"
        r"|at the end|end (?:by|with)|to finish|in that order|before any(?:body|one)|(?:start|begin) (?:by|with)",
        r"最后|随后|接着|接下来|然后|首先|之后|以后|收尾|完(?:了|后|成|再|交|，)|才(?:动|去|开|能)|定稿|先[^，。；]{1,30}[，；]?再",
    ),
    _cue("a product handed on", "chain", 2.0, 2,
        r"(?:from|against|follow\w{0,3}|by|with|under|until|over|through|to|of|on|in) (?:the|that|this|these"
        r"|those) (?:\w+ )?"
        rf"{_PRODUCT}|(?:that|those|these) {_PRODUCT}|(?:from|against) (?:it|them)|in hand"
        rf"|hand(?:ed)? [^.;]{{0,30}}over"
        r"|(?:was|as|is) (?:decided|picked|chosen|specified|described|recommended)|based on (?:the|that|it)"
        r"|according to|the (?:winner|outcome|reproduction)",
        r"(?:照着?|按照?|依据?|拿着?|凭|对照|根据|基于)(?:此|这|该|它|稿|文档|方案|清单|设计|数据|结果|规格|表|计划|结论|报告)",
    ),
    _cue("behaviour pinned or reproduced first", "chain", 2.0, 1,
        r"(?:pin|nail|lock|freeze|characteri[sz]e) [^.;]{1,40}|characteri[sz]ation|snapshots?|golden|regression test"
        r"|repro|reproduced?|(?:failing|red|minimal) (?:\w+ )?(?:test|case)",
        r"快照|钉住|钉成|固定住|锁[定住]|复现|失败的?用例|基线",
    ),
    # -- pieces that do not need each other
    Cue("pieces independent of one another", "decentralized", 2.5, 2,
        lambda text: len(DENIED.findall(text)) + _INDEPENDENT(text)),
    _cue("the same for each", "decentralized", 1.0, 2,
        r"each|every|apiece|respective(?:ly)?|for all \w+|one (?:\w+ )?(?:per|for each)",
        r"每|逐[个一]|挨个|依次|分别|各",
    ),
    _cue("a number of units", "decentralized", 1.5, 2,
        rf"(?:all )?{_NUMBER} (?:[\w'’-]{{1,30}} ){{0,3}}?(?!{_MEASURE}\b)\w{{2,30}}[^us\W]s",
        r"(?:[三四五六七八九十]|(?<![\d.])(?:[3-9]|[1-9]\d)) ?[个份家套处种篇台款门项类路条](?!月|小时|字)",
    ),
    _cue("several viewpoints, candidates or suspicions", "decentralized", 2.0, 1,
        r"opinions|angles|(?:view|stand)points|perspectives|suspicions|suspects|candidates|contenders|alternatives"
        r"|theories|hypotheses|explanations|compare notes",
        r"怀疑|嫌疑|意见|角度|视角|方面|候选|有人|看法",
    ),
    # -- something to be designed and kept in step
    Cue("several components", "centralized", 1.5, 2, lambda text: _components(text) - 1),
    _cue("something shared", "centralized", 2.0, 2,
        r"common|shar(?:ed?|ing)|agree\w*|unified|joint(?:ly)?|consistent|one (?:[\w-]+ ){0,2}(?:notion|contract"
        r"|schema|format|vocabulary|protocol|plan|model|api|layout)|same (?:[\w-]+ )?(?:schema|format|contract"
        r"|protocol|ids?|model|rules)",
        r"共用|共享|同一[套个]|统一|一致|对齐|约定|一套|公共",
    ),
    _cue("a contract between parts", "centralized", 1.0, 2,
        r"protocol|schema|contract|interfaces?|api|format|budget|versions?|back-?pressure|representation|data model"
        r"|payload|handshake|permissions?|state machine",
        r"协议|契约|schema|接口|预算|背压|模型|签名|规范|事件|字段",
    ),
    _cue("to be designed first", "centralized", 2.0, 1,
        r"(?:be|been|needs?) (?:\w+ ){0,2}(?:designed|settled|agreed|worked out|chosen|invented|divided|weighed"
        r"|drawn up|defined|decided|negotiated)|settle|work out|negotiat\w+|agree on|undecided|not exist yet"
        r"|reconcil\w+|trade-?offs?",
        r"没定|商[量定]|一起设计|要定|得先|敲定|定下来|谈拢",
    ),
    _cue("parts that hang together", "centralized", 2.0, 2,
        r"all (?:of them|three|four|sides)|all (?:\w+ )?(?:read|speak|sit|talk|follow|assume|share|use|need|depend)"
        r"|one another|each other|in (?:lock)?step|in sync|together|break\w* [^.;]{0,20}others?|touches|depends? on"
        r"|rel(?:y|ies) on|coupled|entangled|interact\w*|coordinat\w+|simultaneously|(?:up|down)stream",
        r"跟着|一起|上下游|依赖|联动|联调|之间|三[边块方]|合起来|互相|配合|协调|牵扯|耦合|同步",
    ),
    _cue("an unknown cause", "centralized", 3.0, 1,
        r"some(?:one|body) (?:must|has to|should) (?:lead|direct|coordinate)|any of (?:them|these) (?:may|might|could)"
        r"|cause (?:is )?unknown|unknown cause|(?:nobody|no one) knows|(?:don't|do not) know (?:why|where|which)|hunt"
        r"|root cause|track down|blam(?:es?|ing)",
        r"原因不明|查到底|说不清|牵头|都说自己|不知道(?:是|在)?哪|根因|甩锅",
    ),
    _cue("a live cut-over", "centralized", 2.5, 1,
        r"(?:cut|switch)(?:-| )?over|downtime|data loss|outage|while [^.;]{1,30} (?:keep|work|run)\w*|way back"
        r"|mixed versions|roll(?:ing)?[ -]?back|gradually|phased|dual[ -]writ\w+|go back|live (?:traffic|system"
        r"|service)|already installed|old (?:and new|clients)|(?:keep|stay)s? (?:running|working|serving|online)"
        r"|co-?exist",
        r"停机|不能停|不中断|灰度|双写|回[退滚]|退回|切换|同一晚|过渡期|平滑|割接|新[老旧]",
    ),
)
# fmt: on
