"""Rules that assign one of about 50 task types to an instruction. The table is meant to be read and edited.

A rule is (task type, English pattern, Chinese pattern). The patterns are regular expressions and ignore case. The first
rule that matches the user's last turn gives the type. Special rules come before general ones: "write a SQL query" is
code/sql, not code/write. If no rule matches, the type is other/question or other/instruction.

Rules need no model, so they describe a source before any request is paid for. Balancing uses the teacher's categories
(step 3) instead.
"""

import re

HEAD = 600  # characters matched: the start of a text, and the end of a long one
TASK_TYPES = (
    # safety comes first: the topic matters more than the form
    ("safety/harmful request",
     r"\b(how (can|do|to|would) (i|you|we|one)?\b(?!.{0,40}\b(prevent|protect|avoid|stop|defuse|nobody"
     r"|explain|history)\b).{0,40}\b(bomb|explosives?|poison (someone|him|her)|kill (someone|him|her|my)"
     r"|steal|rob|shoplift|meth|hack into|stalk|blackmail|get away with)|make (a|an) (bomb|weapon"
     r"|explosive)|(ways? to|(how|where) (can|could|do|would|to)( i| you| we)?) commit (a crime|fraud"
     r"|suicide)|(how (can|could|do|to|would|should)|where|ways?|want|need|help me|tell me|teach me"
     r"|if i)\b(?!.{0,40}\b(prevent|protect|avoid|stop|defuse|nobody|explain|history)\b).{0,50}\b((buy|sell"
     r"|make|cook|get|order|smuggle)( some| me)? (cocaine|heroin|meth|crack|illegal drugs|fake (ids?"
     r"|passports?|license))|(steal|rob|shoplift) (a|an|the|some|from|money|cars?|it|his|her|their)"
     r"|hack (into|someone|his|her|my (boss|ex|neighbor|wife|husband|friend)|somebody)|(kill|murder|poison"
     r"|torture|kidnap|blackmail|stalk) (a person|people|someone|somebody|him|her|them|my (boss|ex|wife"
     r"|husband|neighbou?r|mother|father|girlfriend|boyfriend|roommate|coworker))|traffic (in )?(humans?"
     r"|human beings|people|children)|launder money|evade taxes|get away with (murder|a crime|stealing)))\b",
     r"(怎么|如何|怎样)(?!.{0,8}(防|避免|应对|处理|识别|帮|保护|阻止|劝|举报)).{0,12}(制造炸弹|做炸弹|下毒"
     r"|杀人|偷窃|抢劫|吸毒|自杀|盗取|诈骗)"),
    ("safety/bias and ethics",
     r"\b(racis[mt]|sexis[mt]|stereotyp|discriminat|ethical(ly)? (issue|dilemma|implication|consideration)"
     r"|is it (ethical|moral|wrong) to)\b",
     r"(歧视|偏见|伦理|道德(问题|困境)|刻板印象)"),
    ("safety/privacy",
     r"\b(personal (data|information)|(home|residential) address (of|for)|who lives at"
     r"|social security number|privacy (policy|law|concern)|password of)\b",
     r"(个人隐私|身份证号|隐私(保护|政策|泄露))"),
    # code
    ("code/sql",
     r"\b(sql|mysql|postgres(ql)?|sqlite|select \*|database query)\b",
     r"(sql|数据库查询|查询语句)"),
    ("code/shell",
     r"\b(bash|shell (script|command)|linux command|command[- ]line|powershell|terminal command|dockerfile"
     r"|docker|git (command|commit|rebase|merge))\b",
     r"(shell|终端命令|linux ?命令|命令行)"),
    ("code/web",
     r"\b(html|css|webpage|web page|javascript|react|jquery|vue\.?js|dom element|website (layout|code))\b",
     r"(html|css|网页(代码|设计|布局)|javascript|前端)"),
    ("code/debug",
     r"\b(debug|fix (the|this|a|any) (code|bug|error|function|program|syntax)|(find|identify|spot) (the|a"
     r"|any) (bug|error)s? in (the|this) (following |given |above )?(code|program|function|snippet)|(code"
     r"|program|function|script)\b.{0,60}\bwhat('s| is) wrong|traceback|stack trace|compil(e|er) error)\b",
     r"(调试|修复.{0,6}(代码|程序|错误|bug)|代码.{0,8}(错误|报错|bug))"),
    ("code/explain",
     r"\b(explain|describe|what does|understand).{0,40}\b(code|function|snippet|script|program)\b"
     r"|\bwhat (is|will be) the output of\b",
     r"(解释|说明).{0,12}(代码|函数|程序)|代码的(作用|含义|功能)"),
    ("code/rewrite",
     r"\b(refactor|rewrite|convert|optimi[sz]e|translate|port|simplify|edit|modify|change"
     r"|update).{0,40}\b(code|function|script|program|python|java|c\+\+|loop|snippet)\b",
     r"(重构|优化|改写|转换).{0,10}(代码|函数|程序)"),
    ("code/algorithm",
     r"\b(algorithm|time complexity|big[- ]o|binary search|sort(ing)? (algorithm|an array|a list)"
     r"|linked list|dynamic programming|recursi(on|ve)|binary tree|data structure|fibonacci)\b",
     r"(算法|时间复杂度|二分查找|链表|动态规划|递归|二叉树|数据结构|冒泡排序|快速排序)"),
    ("code/write",
     r"\b(python|java|c\+\+|c#|rust|golang|php|ruby|kotlin|swift|matlab|perl|typescript|pseudo-?code)\b"
     r"|\b(write|create|implement|generate|design|develop|build|construct|code|provide|define"
     r"|compute).{0,40}\b(function|program|script|class|code|method|loop|array|api|app|application|macro"
     r"|unit ?tests?|test cases?)\b|\b(regex|regular expressions?|pytest|unit ?tests?)\b"
     r"|\b(typecast|integer variable|nested list|tuple|hash ?map|json object)\b|```|\bdef \w+\("
     r"|\n\s*[A-Za-z_]\w+ ?= ?[\[({\"'\d]",
     r"(编写|写|实现|创建|设计|开发).{0,14}(代码|函数|程序|脚本|类(?![似型别比])|接口|应用(?!文))|正则"
     r"|单元测试|python|java|c\+\+"),
    # mathematics
    ("mathematics/proof",
     r"\b(prove (that|the|by)|proof (of|that)|show that (the|for|if|every))\b",
     r"(证明[:：]?.{0,20}(=|等于|成立|定理|不等式)|求证)"),
    ("mathematics/calculus",
     r"\b(derivative|integral|integrate|differentiate|limit of|differential equation|gradient of)\b",
     r"(导数|积分|微分|求导|极限)"),
    ("mathematics/geometry",
     r"\b(triangle|rectangle|circle|radius|perimeter|circumference|hypotenuse|polygon|(area|volume) of"
     r"|angles? of|degrees? (angle|celsius)|coordinates? of)\b",
     r"(三角形|矩形|长方形|圆(形|的)|半径|周长|面积|体积|多边形)"),
    ("mathematics/probability and statistics",
     r"\b(probabilit(y|ies)|dice|coin (toss|flip)|standard deviation|variance|median|(calculate|find"
     r"|compute) the (mean|average|mode)|permutations?|combinations? of|expected value"
     r"|how many (different )?ways)\b",
     r"(概率|骰子|抛硬币|标准差|方差|中位数|平均数|排列|组合数)"),
    ("mathematics/number theory",
     r"\b(prime (number|factor)|greatest common (divisor|factor)|least common multiple|\bgcd\b|\blcm\b"
     r"|remainder (when|of|is|if)|divisible by|units digit|odd numbers?|even numbers?|factorial)\b",
     r"(质数|素数|最大公约数|最小公倍数|余数|整除|阶乘)"),
    ("mathematics/algebra",
     r"\b(solve (for|the (equation|system|following equation)|x)|equations?|polynomial|quadratic"
     r"|factori[sz]e|simplify the expression|inequality|slope|matri(x|ces)|vectors?|logarithm)\b"
     r"|\b\d*x\s*[-+=]\s*\d",
     r"(方程|多项式|因式分解|不等式|化简|矩阵|向量|对数|函数f)"),
    ("mathematics/word problem",
     r"(?s)\A(?=.*(\d|\b(two|three|four|five|six|seven|eight|nine|ten|twenty|dozen|half"
     r"|twice)\b)).*\b(how (many|much|long|far|old|fast|large|deep|tall|heavy|likely)|what('s| is| was| are"
     r"| were| will be) (the |his |her |their |its )?(\w+ ){0,2}(total|average|difference|ratio"
     r"|percent(age)?|cost|price|profit|salary|age|speed|sum|area|distance|weight|height|number"
     r"|simple interest)|in how many|(by )?what percent(age)?|what (length|amount|score|grade|fraction"
     r"|distance)|(find|calculate|determine|compute) (the|his|her|their|how))\b.*[?.]"
     r"|\A(?=.*\d.*\d).*\bhow (many|much)\b",
     r"(?s)\A(?=(?P<number>.*?(\d(?!\d{0,3}年)|(?<![第\d])[两二三四五六七八九十百](个|天|只|人|元|本|次|条"
     r"|块|颗|棵|张|支|枝|岁|米|斤|页|辆|件|箱|盒|名|倍|小时|分钟))))(?P=number).*(多少"
     r"|(?<![前后好这那十数举说写给列荐第])几(个|天|只|人|元|本|次|条|块|颗|棵|张|支|枝|岁|米|斤|页|辆|件"
     r"|箱|盒|名|倍|小时|分钟)(?=[^。]*\Z))[^。！？?!\n]*[。！？?!]?\s*([（(][^）)\n]*[）)])?\Z"),
    ("mathematics/arithmetic and units",
     r"\bconvert.{0,30}\b(miles?|km|kilomet|feet|meters?|inches|pounds?|kg|celsius|fahrenheit|decimal"
     r"|binary|fraction|percent)"
     r"|\b(add|subtract|multiply|divide|calculate|compute|evaluate|sum of|product of|square root)\b(?=.*\d)"
     r"|\d\s*[-+*/×÷^]\s*\d+\s*(=|\?|$)",
     r"(换算|转换(为|成)(公里|米|摄氏|华氏|二进制|十进制|克)|计算|求和|加上|减去|乘以|除以|平方根)"
     r"|\d\s*[-+*/×÷]\s*\d+\s*(=|等于|？|\?|$)"),
    # reasoning
    ("reasoning/multiple choice",
     r"(?s)\(?\ba[.):].{1,200}\bb[.):].{1,200}\bc[.):]"
     r"|\b(multiple[- ]choice|which (one )?of the following|choose (the|one|from)|select the (correct|best"
     r"|right|most))\b",
     r"(?s)(单选|多选|选择题|下列(各项|选项|哪|说法)|以下哪|A[.．、].{1,120}B[.．、])"),
    ("reasoning/logic puzzle",
     r"\b(riddle|logic(al)? (puzzle|problem|fallac)|puzzle|syllogism|deduce|premises?|analogy|odd one out"
     r"|does not belong|brain ?teaser|sudoku|next (number|term|letter) in (the|this) (sequence|series)"
     r"|truth table)\b",
     r"(谜语|脑筋急转弯|逻辑推理|推理题|逻辑(题|谬误)|猜一(个|字|物)|数列的下一个|类比|不属于同一)"),
    ("reasoning/cause and effect",
     r"^why\b"
     r"|\b(what (causes?|caused|happens (if|when)|would happen)|reasons? (for|why|behind)|(cause"
     r"|causes) (of|and)|consequences? of|effects? of|impacts? of)\b",
     r"(为什么|为何|原因|导致|影响)"),
    ("reasoning/comparison",
     r"\b(compare|contrast|differences? between|differ from|pros and cons|advantages and disadvantages"
     r"|similarit(y|ies)|versus|vs\.?|better than)\b",
     r"(比较|对比|区别|不同之处|异同|优缺点|差异|相比)"),
    # extraction and classification
    ("extraction/sentiment",
     r"\b(sentiment|positive or negative|(emotion|tone|mood) (of|in|expressed)|classify .{0,30}(review"
     r"|tweet))\b",
     r"(情感(分析|分类|倾向)|情绪|正面还是负面|积极还是消极|褒义|贬义)"),
    ("extraction/summary",
     r"\b(summari[sz]e|summary|tl;?dr|key (points|takeaways)|main (idea|points?|argument)|condense|shorten"
     r"|abstract of|in one sentence|give .{0,12}(headline|title))\b",
     r"(总结|摘要|概括|概述|归纳|主旨|大意|起.{0,4}标题)"),
    ("extraction/information",
     r"\b(extract|identify|find|list|locate|highlight|pick out|underline).{0,40}\b(in|from|within|of) (the"
     r"|this|these|a|each) (given |following |above |below |input )?(text|sentences?|paragraph|passage"
     r"|article|document|list|data|words?|statement|input|phrase)\b"
     r"|\b(named entit|part[- ]of[- ]speech|keywords?)",
     r"((?<!公积金)(提取|抽取)(?!公积金)|(找出|识别)[^。\n]{0,6}(文本|文章|短文|文中|句子|句中|段落|列表"
     r"|对话)|(文本|文章|短文|文中|句子|句中|段落|列表|对话)[^。\n]{0,12}(找出|识别)|(找出|给出"
     r"|列出).{0,4}关键词|命名实体)"),
    ("extraction/reading comprehension",
     r"\b(based on|according to|given|read) (the|this|following).{0,20}(passage|paragraph|article|text"
     r"|context|story|information)\b|\bcontext:|\bpassage:",
     r"(根据(以下|下面|上述|文章|短文|材料)|阅读(以下|下面|理解)|文章[:：])"),
    ("extraction/classification",
     r"\b(classif(y|ication)|categori[sz]e|(label|sort|group|tag) (the|these|this|them|each|all|following"
     r"|items?|words?|it|a list)\b)|\bdetermine (if|whether)\b|\bwhich category\b"
     r"|\bdetect (if|whether|any)\b",
     r"(分类|归类|类别|判断)"),
    ("extraction/table and format",
     r"\b(table|csv|json|xml|yaml|spreadsheet|excel|bullet (points?|list)|markdown|format (the|this|these)"
     r"|in alphabetical order)\b",
     r"(表格|csv|json|列表形式|excel|格式(化|转换))"),
    # the remaining yes-or-no questions; those about a text match a rule above
    ("reasoning/yes or no",
     r"^(q: |[^.?\n]{0,90}[.:,!] )?(is|are|was|were|do|does|did|can|could|would|will|has|have"
     r"|should) (?!you\b|i\b)[^\n?]{3,200}\?|\b(true or false|yes or no)\b",
     r"(是否|对吗|是真的吗|判断.{0,10}(对错|正误|真假)|是不是)"),
    # language
    ("language/translation",
     r"\b(translat(e|ion)|the (french|spanish|german|chinese|japanese|italian|latin) word for|(in|into"
     r"|to) (english|spanish|french|german|chinese|japanese|italian|latin|russian|portuguese|arabic|korean"
     r"|hindi|polish|romanian))\b",
     r"(翻译|译成|译为|(用|转换成)(英|中|法|日|德|韩|俄)(文|语))"),
    ("language/grammar and proofreading",
     r"\b(grammar|grammatical(ly)?|proofread|spelling|punctuation|correct (the|this|these"
     r"|any) .{0,30}(sentence|text|error|mistake)|(verb|past|present|future) tense|passive voice"
     r"|active voice|plural (form )?of|run-on)\b",
     r"(语法|病句|改错|错别字|拼写|标点|时态|被动语态|修改.{0,6}句子)"),
    ("language/paraphrase",
     r"\b(paraphrase|rephrase|re-?write|reword|restate|simplify|make (it|this|the .{1,20}) (more|sound"
     r"|shorter|longer)|change the (tone|style)|in (your|other) (own )?words)\b",
     r"(改写|重写|换(一)?种(说法|表达)|润色|复述|简化|改成)"),
    ("language/words",
     r"\b(synonyms?|antonyms?|rhymes?|define|definition of|meaning of|what does .{1,40} mean|etymology"
     r"|idioms?|opposite of|anagram|use the word|vocabulary|suffix|prefix|homonym|acronym|palindrome)\b",
     r"(同义词|反义词|近义词|成语|词语|什么意思|释义|造句|押韵|含义|定义)"),
    ("language/completion",
     r"\b(fill in|complete the (sentence|following|phrase|paragraph|story|proverb)|finish the|missing word"
     r"|continue (the|this|writing)|add .{0,20}to the (sentence|end))\b",
     r"(填空|补全|完成(句子|下面)|续写|补充)"),
    # dialogue
    ("dialogue/identity",
     r"\b(who (are|made|created|built|developed|trained) you|your (name|creator|developer)"
     r"|are you (an? )?(ai|human|robot|chatgpt|bot)|introduce yourself|what can you do)\b",
     r"(你是谁|你叫什么|谁(开发|创造|训练)(了)?你|介绍.{0,4}你自己|你是.{0,6}(人工智能|机器人|模型)"
     r"|你能做什么)"),
    ("dialogue/role play",
     r"\b(imagine (you|that you|yourself|being)|pretend|act as|role[- ]?play|you are (a|an|the|playing)"
     r"|as an? \w+, (you|write|describe|explain)|in the (style|voice|persona) of|from the perspective of"
     r"|assume the (role|identity)|take on the (role|persona)|embody|your character)\b",
     r"(扮演|假设你是|想象(你|自己)|假如你是|角色|作为一(名|个|位))"),
    ("dialogue/conversation",
     r"\b(dialogue|conversation|(chat|interview|interaction) between)\b"
     r"|^(hi|hello|hey|thanks|thank you|good (morning|evening|night))\b",
     r"(对话|会话|聊天)|^(你好|您好|谢谢|早上好|晚安|再见|嗨)"),
    # writing
    ("writing/poem and lyrics",
     r"\b(poems?|poetry|haiku|limerick|sonnet|verses?|lyrics|song|rap|ode|ballad)\b",
     r"(诗|歌词|对联|绝句|律诗|俳句)"),
    ("writing/story",
     r"\b(story|stories|fairy ?tale|fable|novel|narrative|plot|science fiction|fictional|short fiction"
     r"|character (description|backstory))\b",
     r"(故事|小说|童话|寓言|情节)"),
    ("writing/letter and email",
     r"\b(e-?mail|letter|memo|invitation|cover letter|thank[- ]you note|reply to|apology|resignation"
     r"|message to)\b",
     r"(邮件|信件|写(一)?封|书信|邀请函|求职信|道歉信|感谢信|通知)"),
    ("writing/marketing",
     r"\b(advert(isement|ising)?|slogan|marketing|product description|tagline|social media|tweet|blog ?post"
     r"|press release|sales pitch|campaign|seo|caption|brand name|hashtags?)\b",
     r"(广告|文案|口号|标语|营销|产品描述|推文|宣传|博客|朋友圈)"),
    ("writing/script and speech",
     r"\b(speech|screenplay|script|monologue|scene|skit|joke|pun|toast|stand-up)\b",
     r"(演讲|剧本|独白|台词|发言稿|笑话|段子)"),
    ("writing/essay",
     r"\b(essay|article|paragraph|report|review|argument(ative)?|introduction|thesis|composition|outline"
     r"|write about|write (a|an|some|two|three|\d+) .{0,30}(sentences?|words|pages?)|describe"
     r"|description)\b",
     r"(作文|文章|短文|论文|报告|评论|议论文|大纲|写一(篇|段)|描述|描写)"),
    # advice and planning
    ("advice/plan and schedule",
     r"\b(plan|schedule|itinerary|agenda|timetable|strategy|to-?do list|roadmap|workout|routine)\b",
     r"(计划|规划|日程|行程|方案|安排|策略)"),
    ("advice/cooking",
     r"\b(recipe|cook|bake|ingredients?|meal|dish|dinner|breakfast|cocktail)\b",
     r"(食谱|菜谱|做法|烹饪|食材|做菜|早餐|晚餐)"),
    ("advice/health",
     r"\b(health(y)?|diet|exercise|sleep|symptoms?|disease|medicine|doctor|weight loss|headache|mental"
     r"|anxiety|depress(ed|ion)|vitamin|pain)\b",
     r"(健康|饮食|锻炼|睡眠|症状|疾病|药|医生|减肥|焦虑|抑郁|失眠)"),
    ("advice/how to",
     r"\b(how (do|can|should|would|to|might)|steps? (to|for|of)|(give|suggest|provide|offer|list|share"
     r"|what are) .{0,30}\b(tips|advice|ways|suggestions|recommend|strategies|methods|techniques|practices)"
     r"|recommend|suggest|advice|should i|what (should|can) i|best way|tips)\b",
     r"(如何|怎么|怎样|建议|推荐|方法|步骤|技巧|注意事项|应该)"),
    ("writing/ideas and names",
     r"\b(brainstorm|ideas?|generate|create|come up with|invent|think of|make up|design|propose|compose"
     r"|name (for|of)|random|make a)\b",
     r"(生成|创造|想出|创意|点子|主意|取名|起名|设计|构思|创建)"),
    # knowledge
    ("knowledge/science and technology",
     r"\b(computer|software|machine learning|artificial intelligence|internet|blockchain|technology|neural"
     r"|deep learning|operating system|cyber|gpu|physics|chemi(stry|cal)|biolog(y|ical)|atoms?|molecul"
     r"|cells?|dna|photosynthesis|gravity|energy|planets?|solar|evolution|species|animals?|plants?|element"
     r"|quantum|climate|ecosystem|scientific)\b",
     r"(计算机|软件|机器学习|人工智能|互联网|网络|区块链|技术|深度学习|操作系统|物理|化学|生物|原子|分子"
     r"|细胞|光合作用|引力|能量|行星|太阳|进化|物种|动物|植物|气候|科学)"),
    ("knowledge/history and politics",
     r"\b(histor(y|ical)|war|century|ancient|president|empire|king|queen|revolution|government|politic(s"
     r"|al)|election|treaty|constitution|democracy)\b",
     r"(历史|战争|世纪|古代|总统|帝国|皇帝|朝代|革命|政府|政治|选举|条约|宪法)"),
    ("knowledge/geography",
     r"\b(capital (city )?of|countr(y|ies)|cit(y|ies)|continent|ocean|river|mountain|located|population"
     r"|island|state of|where is)\b",
     r"(首都|国家|城市|大洲|海洋|河流|山脉|位于|人口|岛|哪里|地理)"),
    ("knowledge/economics and law",
     r"\b(econom(y|ic|ics)|inflation|market|stocks?|invest|business|company|gdp|tax|bank|law|legal|court"
     r"|contract|copyright|finance|supply and demand)\b",
     r"(经济|通货膨胀|市场|股票|投资|企业|公司|税|银行|法律|法院|合同|版权|金融)"),
    ("knowledge/culture and arts",
     r"\b(movies?|films?|books?|authors?|music|paint(ing|er)|artist|art|religion|philosoph|sports?|football"
     r"|festival|actor|album|band|literature|game|culture|museum)\b",
     r"(电影|书籍|作者|音乐|绘画|艺术|宗教|哲学|体育|足球|节日|演员|文学|游戏|文化)"),
    ("knowledge/lists and facts",
     r"^(list|name|give|identify|provide|tell|who|when|where|which)\b"
     r"|\b(examples? of|types? of|features? of|characteristics of|facts? about|names? of)\b",
     r"(列出|列举|举例|给出|找出|识别|例子|谁|什么时候|哪(个|些|年))"),
    ("knowledge/explanation",
     r"\b(explain|what (is|are|was|were|does|do)|what's|concept|theory|how (does|did|is|are)|tell me about"
     r"|outline|discuss|analy[sz]e|evaluate|significance)\b",
     r"(解释|什么是|是什么|概念|理论|讨论|分析|介绍|说明|阐述|谈谈)"),
)  # fmt: skip
_RULES = [(name, re.compile(english, re.I), re.compile(chinese, re.I)) for name, english, chinese in TASK_TYPES]
_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")
_LATIN = re.compile(r"[A-Za-z]")


def language(text: str) -> str:
    """A text's language, "zh", "en" or "other", by its first 40 letters.

    Only the beginning counts, because a text to translate or debug follows the request. A Chinese character counts as
    two words, or as half a word if the text begins with another script.
    """
    head = re.match(r"(?:[\W\d_]*[^\W\d_]){0,40}", text[:HEAD])[0]
    letters = _LETTER.findall(head)
    chinese, words = len(_CJK.findall(head)), len(re.findall("[A-Za-z]+", head))
    kana = sum("\u3040" <= c <= "\u30ff" or "\uac00" <= c <= "\ud7af" for c in head)
    if chinese > 2 * kana and 2 * chinese >= (words if _CJK.match(letters[0]) else 4 * words):
        return "zh"
    return "en" if len(_LATIN.findall(head)) + chinese * (words > 0) >= 0.9 * len(letters) else "other"


def task_type(text: str) -> str:
    """The type of the first rule that matches the instruction.

    English patterns are also tried on Chinese text, so that "用 Python 写" matches either pattern.
    """
    text = text.strip()
    if len(text) > 2 * HEAD:
        text = text[:HEAD] + "\n" + text[-HEAD:]
    chinese = _CJK.search(text) is not None
    for name, en, zh in _RULES:
        if en.search(text) or chinese and zh.search(text):
            return name
    return "other/question" if re.search(r"[?？]\s*$", text) else "other/instruction"


def conversation_type(messages: list[dict]) -> str:
    """The task type of the user's last turn. If no rule matches it ("Go on."), of the turn before, and so on."""
    types = [task_type(m["content"]) for m in reversed(messages) if m["role"] == "user"]
    return next((name for name in types if not name.startswith("other/")), types[0])
