"""The facts of the sample world, as tables: one fact a row, columns separated by ``|``, ``-`` where a fact is left out.

Every table gives Chinese and English side by side. English names carry the article with which they stand inside a
sentence ("the Netherlands", "a dog"). Facts that change often or are disputed (populations, a capital that is being
moved, a language that is official only in part of a country) are left out on purpose.
"""

from __future__ import annotations


def table(text: str) -> list[tuple[str, ...]]:
    """Read a table: one tuple of stripped cells for each line that is not blank."""
    return [tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines() if line.strip()]


# country zh | en | capital zh | en | continent zh | en | currency zh | en | official language zh | en
COUNTRIES = table("""
中国 | China | 北京 | Beijing | 亚洲 | Asia | 人民币 | the renminbi | 汉语 | Chinese
日本 | Japan | 东京 | Tokyo | 亚洲 | Asia | 日元 | the yen | 日语 | Japanese
韩国 | South Korea | 首尔 | Seoul | 亚洲 | Asia | 韩元 | the won | 韩语 | Korean
印度 | India | 新德里 | New Delhi | 亚洲 | Asia | 印度卢比 | the Indian rupee | - | -
泰国 | Thailand | 曼谷 | Bangkok | 亚洲 | Asia | 泰铢 | the baht | 泰语 | Thai
越南 | Vietnam | 河内 | Hanoi | 亚洲 | Asia | 越南盾 | the dong | 越南语 | Vietnamese
蒙古 | Mongolia | 乌兰巴托 | Ulaanbaatar | 亚洲 | Asia | 图格里克 | the tugrik | 蒙古语 | Mongolian
伊朗 | Iran | 德黑兰 | Tehran | 亚洲 | Asia | - | - | 波斯语 | Persian
沙特阿拉伯 | Saudi Arabia | 利雅得 | Riyadh | 亚洲 | Asia | 里亚尔 | the riyal | 阿拉伯语 | Arabic
马来西亚 | Malaysia | 吉隆坡 | Kuala Lumpur | 亚洲 | Asia | 林吉特 | the ringgit | 马来语 | Malay
菲律宾 | the Philippines | 马尼拉 | Manila | 亚洲 | Asia | - | - | - | -
尼泊尔 | Nepal | 加德满都 | Kathmandu | 亚洲 | Asia | - | - | 尼泊尔语 | Nepali
巴基斯坦 | Pakistan | 伊斯兰堡 | Islamabad | 亚洲 | Asia | - | - | - | -
法国 | France | 巴黎 | Paris | 欧洲 | Europe | 欧元 | the euro | 法语 | French
德国 | Germany | 柏林 | Berlin | 欧洲 | Europe | 欧元 | the euro | 德语 | German
意大利 | Italy | 罗马 | Rome | 欧洲 | Europe | 欧元 | the euro | 意大利语 | Italian
西班牙 | Spain | 马德里 | Madrid | 欧洲 | Europe | 欧元 | the euro | 西班牙语 | Spanish
葡萄牙 | Portugal | 里斯本 | Lisbon | 欧洲 | Europe | 欧元 | the euro | 葡萄牙语 | Portuguese
英国 | the United Kingdom | 伦敦 | London | 欧洲 | Europe | 英镑 | the pound sterling | 英语 | English
荷兰 | the Netherlands | 阿姆斯特丹 | Amsterdam | 欧洲 | Europe | 欧元 | the euro | 荷兰语 | Dutch
波兰 | Poland | 华沙 | Warsaw | 欧洲 | Europe | 兹罗提 | the zloty | 波兰语 | Polish
瑞典 | Sweden | 斯德哥尔摩 | Stockholm | 欧洲 | Europe | 瑞典克朗 | the Swedish krona | 瑞典语 | Swedish
挪威 | Norway | 奥斯陆 | Oslo | 欧洲 | Europe | 挪威克朗 | the Norwegian krone | 挪威语 | Norwegian
丹麦 | Denmark | 哥本哈根 | Copenhagen | 欧洲 | Europe | 丹麦克朗 | the Danish krone | 丹麦语 | Danish
芬兰 | Finland | 赫尔辛基 | Helsinki | 欧洲 | Europe | 欧元 | the euro | - | -
希腊 | Greece | 雅典 | Athens | 欧洲 | Europe | 欧元 | the euro | 希腊语 | Greek
奥地利 | Austria | 维也纳 | Vienna | 欧洲 | Europe | 欧元 | the euro | 德语 | German
瑞士 | Switzerland | 伯尔尼 | Bern | 欧洲 | Europe | 瑞士法郎 | the Swiss franc | - | -
匈牙利 | Hungary | 布达佩斯 | Budapest | 欧洲 | Europe | 福林 | the forint | 匈牙利语 | Hungarian
捷克 | Czechia | 布拉格 | Prague | 欧洲 | Europe | 捷克克朗 | the Czech koruna | 捷克语 | Czech
俄罗斯 | Russia | 莫斯科 | Moscow | - | - | 卢布 | the ruble | 俄语 | Russian
乌克兰 | Ukraine | 基辅 | Kyiv | 欧洲 | Europe | 格里夫纳 | the hryvnia | 乌克兰语 | Ukrainian
冰岛 | Iceland | 雷克雅未克 | Reykjavik | 欧洲 | Europe | 冰岛克朗 | the Icelandic krona | 冰岛语 | Icelandic
土耳其 | Turkey | 安卡拉 | Ankara | - | - | 里拉 | the lira | 土耳其语 | Turkish
埃及 | Egypt | 开罗 | Cairo | 非洲 | Africa | 埃及镑 | the Egyptian pound | 阿拉伯语 | Arabic
肯尼亚 | Kenya | 内罗毕 | Nairobi | 非洲 | Africa | 肯尼亚先令 | the Kenyan shilling | - | -
尼日利亚 | Nigeria | 阿布贾 | Abuja | 非洲 | Africa | 奈拉 | the naira | 英语 | English
摩洛哥 | Morocco | 拉巴特 | Rabat | 非洲 | Africa | 迪拉姆 | the dirham | - | -
美国 | the United States | 华盛顿 | Washington | 北美洲 | North America | 美元 | the US dollar | - | -
加拿大 | Canada | 渥太华 | Ottawa | 北美洲 | North America | 加元 | the Canadian dollar | - | -
墨西哥 | Mexico | 墨西哥城 | Mexico City | 北美洲 | North America | - | - | - | -
古巴 | Cuba | 哈瓦那 | Havana | 北美洲 | North America | - | - | 西班牙语 | Spanish
巴西 | Brazil | 巴西利亚 | Brasilia | 南美洲 | South America | 雷亚尔 | the real | 葡萄牙语 | Portuguese
阿根廷 | Argentina | 布宜诺斯艾利斯 | Buenos Aires | 南美洲 | South America | 比索 | the peso | 西班牙语 | Spanish
智利 | Chile | 圣地亚哥 | Santiago | 南美洲 | South America | 比索 | the peso | 西班牙语 | Spanish
秘鲁 | Peru | 利马 | Lima | 南美洲 | South America | 索尔 | the sol | - | -
哥伦比亚 | Colombia | 波哥大 | Bogota | 南美洲 | South America | 比索 | the peso | 西班牙语 | Spanish
澳大利亚 | Australia | 堪培拉 | Canberra | 大洋洲 | Oceania | 澳元 | the Australian dollar | - | -
新西兰 | New Zealand | 惠灵顿 | Wellington | 大洋洲 | Oceania | 新西兰元 | the New Zealand dollar | - | -
""")

# name zh | en | symbol | atomic number
ELEMENTS = table("""
氢 | hydrogen | H | 1
氦 | helium | He | 2
锂 | lithium | Li | 3
硼 | boron | B | 5
碳 | carbon | C | 6
氮 | nitrogen | N | 7
氧 | oxygen | O | 8
氟 | fluorine | F | 9
氖 | neon | Ne | 10
钠 | sodium | Na | 11
镁 | magnesium | Mg | 12
铝 | aluminium | Al | 13
硅 | silicon | Si | 14
磷 | phosphorus | P | 15
硫 | sulfur | S | 16
氯 | chlorine | Cl | 17
氩 | argon | Ar | 18
钾 | potassium | K | 19
钙 | calcium | Ca | 20
铁 | iron | Fe | 26
镍 | nickel | Ni | 28
铜 | copper | Cu | 29
锌 | zinc | Zn | 30
银 | silver | Ag | 47
锡 | tin | Sn | 50
碘 | iodine | I | 53
金 | gold | Au | 79
铅 | lead | Pb | 82
铀 | uranium | U | 92
""")

# planet zh | en | ordinal from the Sun zh | en | kind zh | en   (in the order of their distance from the Sun)
PLANETS = table("""
水星 | Mercury | 第 1 | first | 岩石行星 | a rocky planet
金星 | Venus | 第 2 | second | 岩石行星 | a rocky planet
地球 | Earth | 第 3 | third | 岩石行星 | a rocky planet
火星 | Mars | 第 4 | fourth | 岩石行星 | a rocky planet
木星 | Jupiter | 第 5 | fifth | 气态巨行星 | a gas giant
土星 | Saturn | 第 6 | sixth | 气态巨行星 | a gas giant
天王星 | Uranus | 第 7 | seventh | 冰巨行星 | an ice giant
海王星 | Neptune | 第 8 | eighth | 冰巨行星 | an ice giant
""")

# what marks the planet zh | planet zh | en | planet en
PLANET_RECORDS = table("""
最大的行星 | 木星 | the largest planet | Jupiter
最小的行星 | 水星 | the smallest planet | Mercury
最热的行星 | 金星 | the hottest planet | Venus
离太阳最远的行星 | 海王星 | the planet farthest from the Sun | Neptune
被称为红色星球的行星 | 火星 | the planet known as the Red Planet | Mars
光环最明亮的行星 | 土星 | the planet with the brightest rings | Saturn
躺着自转的行星 | 天王星 | the planet that spins on its side | Uranus
我们居住的行星 | 地球 | the planet we live on | Earth
""")

# animal zh | sound zh | en | sound en
ANIMAL_SOUNDS = table("""
狗 | 汪汪 | a dog | a bark
猫 | 喵喵 | a cat | a meow
奶牛 | 哞哞 | a cow | a moo
山羊 | 咩咩 | a goat | a bleat
鸭子 | 嘎嘎 | a duck | a quack
公鸡 | 喔喔 | a rooster | a crow
小鸡 | 叽叽 | a chick | a cheep
蜜蜂 | 嗡嗡 | a bee | a buzz
青蛙 | 呱呱 | a frog | a croak
蛇 | 嘶嘶 | a snake | a hiss
老鼠 | 吱吱 | a mouse | a squeak
鸽子 | 咕咕 | a pigeon | a coo
猪 | 哼哼 | a pig | an oink
马 | 咴咴 | a horse | a neigh
狼 | 嗷呜 | a wolf | a howl
乌鸦 | 哇哇 | a raven | a caw
""")

# grown animal zh | young zh | en | young en   (the languages name the young of different animals, so they differ)
ANIMAL_YOUNG_ZH = table("""
牛 | 牛犊
马 | 马驹
羊 | 羊羔
鸡 | 雏鸡
鹿 | 鹿崽
老虎 | 虎崽
狼 | 狼崽
青蛙 | 蝌蚪
蝴蝶 | 毛毛虫
蚊子 | 孑孓
苍蝇 | 蛆
燕子 | 雏燕
蝗虫 | 蝗蝻
猪 | 猪崽
""")
ANIMAL_YOUNG_EN = table("""
a cow | a calf
a horse | a foal
a sheep | a lamb
a dog | a puppy
a cat | a kitten
a goat | a kid
a pig | a piglet
a lion | a cub
a duck | a duckling
a goose | a gosling
a hen | a chick
a deer | a fawn
a frog | a tadpole
a butterfly | a caterpillar
a kangaroo | a joey
a swan | a cygnet
a seal | a pup
a hare | a leveret
""")

# animal zh | class zh | en | class en
ANIMAL_CLASSES = table("""
鲸 | 哺乳动物 | a whale | mammals
蝙蝠 | 哺乳动物 | a bat | mammals
海豚 | 哺乳动物 | a dolphin | mammals
大象 | 哺乳动物 | an elephant | mammals
兔子 | 哺乳动物 | a rabbit | mammals
猴子 | 哺乳动物 | a monkey | mammals
企鹅 | 鸟类 | a penguin | birds
鸵鸟 | 鸟类 | an ostrich | birds
老鹰 | 鸟类 | an eagle | birds
麻雀 | 鸟类 | a sparrow | birds
孔雀 | 鸟类 | a peacock | birds
乌龟 | 爬行动物 | a turtle | reptiles
鳄鱼 | 爬行动物 | a crocodile | reptiles
蜥蜴 | 爬行动物 | a lizard | reptiles
蟒蛇 | 爬行动物 | a python | reptiles
蟾蜍 | 两栖动物 | a toad | amphibians
蝾螈 | 两栖动物 | a newt | amphibians
鲨鱼 | 鱼类 | a shark | fish
鲤鱼 | 鱼类 | a carp | fish
海马 | 鱼类 | a seahorse | fish
金枪鱼 | 鱼类 | a tuna | fish
蚂蚁 | 昆虫 | an ant | insects
蜻蜓 | 昆虫 | a dragonfly | insects
蟋蟀 | 昆虫 | a cricket | insects
蜘蛛 | 蛛形动物 | a spider | arachnids
蝎子 | 蛛形动物 | a scorpion | arachnids
螃蟹 | 甲壳动物 | a crab | crustaceans
龙虾 | 甲壳动物 | a lobster | crustaceans
""")

# animal zh | en | number of legs
ANIMAL_LEGS = table("""
蜘蛛 | a spider | 8
蝎子 | a scorpion | 8
蚂蚁 | an ant | 6
蜻蜓 | a dragonfly | 6
蜜蜂 | a bee | 6
甲虫 | a beetle | 6
螃蟹 | a crab | 10
龙虾 | a lobster | 10
企鹅 | a penguin | 2
鸵鸟 | an ostrich | 2
老鹰 | an eagle | 2
大象 | an elephant | 4
兔子 | a rabbit | 4
长颈鹿 | a giraffe | 4
乌龟 | a turtle | 4
蚯蚓 | an earthworm | 0
蛇 | a snake | 0
""")

# event zh | en | year
EVENTS = table("""
唐朝建立 | the founding of the Tang dynasty | 618
英国大宪章签署 | the sealing of Magna Carta | 1215
明朝建立 | the founding of the Ming dynasty | 1368
君士坦丁堡陷落 | the fall of Constantinople | 1453
哥伦布首次到达美洲 | the first landing of Columbus in America | 1492
伦敦大火 | the Great Fire of London | 1666
美国发表独立宣言 | the American Declaration of Independence | 1776
法国大革命爆发 | the start of the French Revolution | 1789
滑铁卢战役 | the Battle of Waterloo | 1815
第一次鸦片战争爆发 | the start of the First Opium War | 1840
明治维新开始 | the start of the Meiji Restoration | 1868
苏伊士运河通航 | the opening of the Suez Canal | 1869
埃菲尔铁塔建成 | the completion of the Eiffel Tower | 1889
第一届现代奥运会 | the first modern Olympic Games | 1896
莱特兄弟首次飞行 | the first flight of the Wright brothers | 1903
辛亥革命 | the Xinhai Revolution | 1911
泰坦尼克号沉没 | the sinking of the Titanic | 1912
第一次世界大战爆发 | the start of World War I | 1914
俄国十月革命 | the October Revolution in Russia | 1917
第一次世界大战结束 | the end of World War I | 1918
五四运动 | the May Fourth Movement | 1919
发现青霉素 | the discovery of penicillin | 1928
七七事变 | the Marco Polo Bridge Incident | 1937
联合国成立 | the founding of the United Nations | 1945
中华人民共和国成立 | the founding of the People's Republic of China | 1949
发现脱氧核糖核酸双螺旋结构 | the discovery of the double helix | 1953
第一颗人造卫星升空 | the launch of the first satellite | 1957
加加林飞入太空 | the space flight of Yuri Gagarin | 1961
人类首次登月 | the first Moon landing | 1969
柏林墙倒塌 | the fall of the Berlin Wall | 1989
苏联解体 | the end of the Soviet Union | 1991
香港回归 | the return of Hong Kong to China | 1997
澳门回归 | the return of Macau to China | 1999
北京奥运会 | the Beijing Summer Olympics | 2008
""")

# book zh | author zh | en | author en
BOOKS = table("""
红楼梦 | 曹雪芹 | Dream of the Red Chamber | Cao Xueqin
西游记 | 吴承恩 | Journey to the West | Wu Cheng'en
三国演义 | 罗贯中 | Romance of the Three Kingdoms | Luo Guanzhong
水浒传 | 施耐庵 | Water Margin | Shi Nai'an
聊斋志异 | 蒲松龄 | Strange Tales from a Chinese Studio | Pu Songling
史记 | 司马迁 | Records of the Grand Historian | Sima Qian
呐喊 | 鲁迅 | Call to Arms | Lu Xun
骆驼祥子 | 老舍 | Rickshaw Boy | Lao She
围城 | 钱锺书 | Fortress Besieged | Qian Zhongshu
边城 | 沈从文 | Border Town | Shen Congwen
雷雨 | 曹禺 | Thunderstorm | Cao Yu
哈姆雷特 | 莎士比亚 | Hamlet | William Shakespeare
堂吉诃德 | 塞万提斯 | Don Quixote | Miguel de Cervantes
神曲 | 但丁 | The Divine Comedy | Dante
浮士德 | 歌德 | Faust | Goethe
战争与和平 | 托尔斯泰 | War and Peace | Leo Tolstoy
罪与罚 | 陀思妥耶夫斯基 | Crime and Punishment | Dostoevsky
悲惨世界 | 雨果 | Les Miserables | Victor Hugo
老人与海 | 海明威 | The Old Man and the Sea | Ernest Hemingway
双城记 | 狄更斯 | A Tale of Two Cities | Charles Dickens
傲慢与偏见 | 简·奥斯汀 | Pride and Prejudice | Jane Austen
变形记 | 卡夫卡 | The Metamorphosis | Franz Kafka
百年孤独 | 马尔克斯 | One Hundred Years of Solitude | Garcia Marquez
丑小鸭 | 安徒生 | The Ugly Duckling | Hans Christian Andersen
物种起源 | 达尔文 | On the Origin of Species | Charles Darwin
鲁滨逊漂流记 | 笛福 | Robinson Crusoe | Daniel Defoe
格列佛游记 | 斯威夫特 | Gulliver's Travels | Jonathan Swift
海底两万里 | 凡尔纳 | Twenty Thousand Leagues Under the Sea | Jules Verne
""")

# word zh | en
WORDS = table("""
苹果 | apple
香蕉 | banana
面包 | bread
牛奶 | milk
鸡蛋 | egg
米饭 | rice
桌子 | table
椅子 | chair
窗户 | window
钥匙 | key
雨伞 | umbrella
书 | book
报纸 | newspaper
学校 | school
医院 | hospital
图书馆 | library
机场 | airport
桥 | bridge
河流 | river
山 | mountain
森林 | forest
太阳 | sun
月亮 | moon
云 | cloud
雪 | snow
风 | wind
医生 | doctor
老师 | teacher
学生 | student
朋友 | friend
音乐 | music
时间 | time
自由 | freedom
和平 | peace
自行车 | bicycle
火车 | train
""")

# word zh | opposite zh | en | opposite en
OPPOSITES = table("""
大 | 小 | big | small
高 | 矮 | tall | short
冷 | 热 | cold | hot
快 | 慢 | fast | slow
新 | 旧 | new | old
黑 | 白 | black | white
远 | 近 | far | near
轻 | 重 | light | heavy
软 | 硬 | soft | hard
干 | 湿 | dry | wet
深 | 浅 | deep | shallow
宽 | 窄 | wide | narrow
厚 | 薄 | thick | thin
强 | 弱 | strong | weak
早 | 晚 | early | late
前 | 后 | front | back
内 | 外 | inside | outside
左 | 右 | left | right
上 | 下 | up | down
真 | 假 | true | false
甜 | 苦 | sweet | bitter
安全 | 危险 | safe | dangerous
勇敢 | 胆小 | brave | cowardly
开始 | 结束 | beginning | end
成功 | 失败 | success | failure
朋友 | 敌人 | friend | enemy
聪明 | 愚蠢 | clever | stupid
""")

# amount zh | unit asked for zh | amount en | unit asked for en | value
UNITS = table("""
1 千米 | 米 | 1 kilometre | metres | 1000
1 米 | 厘米 | 1 metre | centimetres | 100
1 米 | 毫米 | 1 metre | millimetres | 1000
1 厘米 | 毫米 | 1 centimetre | millimetres | 10
1 千克 | 克 | 1 kilogram | grams | 1000
1 克 | 毫克 | 1 gram | milligrams | 1000
1 吨 | 千克 | 1 tonne | kilograms | 1000
1 升 | 毫升 | 1 litre | millilitres | 1000
1 公顷 | 平方米 | 1 hectare | square metres | 10000
1 平方千米 | 公顷 | 1 square kilometre | hectares | 100
1 天 | 小时 | 1 day | hours | 24
1 天 | 分钟 | 1 day | minutes | 1440
1 小时 | 分钟 | 1 hour | minutes | 60
1 小时 | 秒 | 1 hour | seconds | 3600
1 分钟 | 秒 | 1 minute | seconds | 60
1 周 | 天 | 1 week | days | 7
1 年 | 个月 | 1 year | months | 12
1 季度 | 个月 | 1 quarter | months | 3
1 世纪 | 年 | 1 century | years | 100
1 英尺 | 英寸 | 1 foot | inches | 12
1 码 | 英尺 | 1 yard | feet | 3
1 英里 | 码 | 1 mile | yards | 1760
1 磅 | 盎司 | 1 pound | ounces | 16
1 加仑 | 夸脱 | 1 gallon | quarts | 4
1 字节 | 比特 | 1 byte | bits | 8
1 周角 | 度 | 1 full circle | degrees | 360
1 打 | 个 | 1 dozen | pieces | 12
2 小时 | 分钟 | 2 hours | minutes | 120
2 周 | 天 | 2 weeks | days | 14
2 年 | 个月 | 2 years | months | 24
""")

WEEKDAYS = table("""
星期一 | Monday
星期二 | Tuesday
星期三 | Wednesday
星期四 | Thursday
星期五 | Friday
星期六 | Saturday
星期日 | Sunday
""")

# month zh | en | days (in a year that is not a leap year)
MONTHS = table("""
一月 | January | 31
二月 | February | 28
三月 | March | 31
四月 | April | 30
五月 | May | 31
六月 | June | 30
七月 | July | 31
八月 | August | 31
九月 | September | 30
十月 | October | 31
十一月 | November | 30
十二月 | December | 31
""")

# term zh | what it is zh | en | what it is en
TERMS = table("""
机器学习 | 让计算机从数据中学习规律的方法 | machine learning | a way for computers to learn patterns from data
深度学习 | 使用多层神经网络的机器学习 | deep learning | machine learning with neural networks of many layers
强化学习 | 靠奖励学会行动的方法 | reinforcement learning | a way of learning to act from rewards
人工智能 | 让机器完成智能任务的技术 | artificial intelligence | machines doing tasks that need thought
神经网络 | 由许多简单单元连成的模型 | a neural network | a model of many simple connected units
语言模型 | 预测下一个词的模型 | a language model | a model that predicts the next word
奖励模型 | 给回答打分的模型 | a reward model | a model that gives marks to answers
梯度 | 函数上升最快的方向 | a gradient | the direction in which a function rises fastest
过拟合 | 记住训练数据却不会推广的现象 | overfitting | learning the training data by heart without understanding it
分词器 | 把文本切成小块的程序 | a tokenizer | a program that cuts text into small pieces
词元 | 模型读写文本的最小单位 | a token | the smallest piece of text that a model reads
注意力机制 | 让模型选择看哪些词的机制 | attention | a way for a model to choose which words to look at
词向量 | 表示词的含义的一串数 | an embedding | a list of numbers that stands for the meaning of a word
损失函数 | 衡量预测有多错的函数 | a loss function | a measure of how wrong a prediction is
学习率 | 每次更新参数的步长 | a learning rate | the size of each step of training
训练集 | 供模型学习的数据 | a training set | the data that a model learns from
测试集 | 用来检验模型的新数据 | a test set | new data that a model is checked with
参数 | 模型在训练中调整的数 | a parameter | a number that a model adjusts in training
预训练 | 在大量文本上进行的第一阶段训练 | pretraining | the first training of a model, on a lot of text
微调 | 用少量数据继续训练模型 | fine-tuning | the further training of a model on a little data
量化 | 用更少的位数存储参数 | quantization | the storing of parameters with fewer bits
算法 | 解决问题的一系列明确步骤 | an algorithm | a list of steps that solves a problem
数据库 | 有条理地存放数据的系统 | a database | a system that keeps data in order
编译器 | 把代码翻译成机器语言的程序 | a compiler | a program that turns code into machine language
操作系统 | 管理计算机的软件 | an operating system | the software that manages a computer
浏览器 | 用来查看网页的程序 | a browser | a program for looking at web pages
密码 | 证明身份的一串秘密字符 | a password | a secret word that proves who you are
质数 | 大于一、只能被一和自己整除的数 | a prime number | a number above one that only one and itself divide
原子 | 化学元素的最小单位 | an atom | the smallest unit of a chemical element
细胞 | 生物体的最小单位 | a cell | the smallest unit of a living thing
细菌 | 只有一个细胞的微小生物 | a bacterium | a tiny living thing of a single cell
疫苗 | 预防疾病的药 | a vaccine | a medicine that prevents a disease
化石 | 古代生物留在石头里的遗迹 | a fossil | the trace of an ancient living thing in stone
光合作用 | 植物用阳光制造养分的过程 | photosynthesis | the way in which plants make food from sunlight
重力 | 地球吸引物体的力 | gravity | the force that pulls things towards the Earth
彩虹 | 雨后阳光形成的七色光带 | a rainbow | a band of colours that sunlight makes after rain
日食 | 月亮挡住太阳的现象 | a solar eclipse | the Moon covering the Sun
月食 | 地球的影子遮住月亮的现象 | a lunar eclipse | the shadow of the Earth falling on the Moon
地震 | 地面突然的震动 | an earthquake | a sudden shaking of the ground
火山 | 会喷出岩浆的山 | a volcano | a mountain that throws out molten rock
沙漠 | 很少下雨的干旱地区 | a desert | a dry land with very little rain
岛屿 | 四面被水包围的陆地 | an island | a piece of land with water on all sides
恒星 | 自己发光的巨大气体球 | a star | a huge ball of glowing gas
卫星 | 绕着行星运行的物体 | a satellite | an object that circles a planet
望远镜 | 用来看远处物体的仪器 | a telescope | an instrument for seeing distant things
显微镜 | 用来看微小物体的仪器 | a microscope | an instrument for seeing tiny things
温度计 | 测量温度的工具 | a thermometer | a tool that measures temperature
指南针 | 指示南北方向的工具 | a compass | a tool that shows where north is
字典 | 解释字词意思的书 | a dictionary | a book that explains words
地图 | 按比例画出地面的图 | a map | a drawing of a place as seen from above
日历 | 列出一年中日子的表 | a calendar | a table of the days of a year
预算 | 对收入和支出的计划 | a budget | a plan for earning and spending money
利息 | 借钱时要多还的钱 | interest | the price of borrowed money
法律 | 国家规定人人遵守的规则 | a law | a rule that everyone in a country must follow
民主 | 由人民决定国家大事的制度 | democracy | the rule of a country by its people
小说 | 讲述虚构故事的长篇作品 | a novel | a long book that tells an invented story
诗歌 | 讲究节奏和韵律的文字 | a poem | a text with rhythm and often rhyme
早餐 | 一天中的第一顿饭 | breakfast | the first meal of the day
邻居 | 住在附近的人 | a neighbour | a person who lives nearby
假期 | 不用上班上学的日子 | a holiday | a day without work or school
""")

# What the passages to be summarised are made of. Who | where | what was done there, told of the past
PEOPLE = table("""
小明 | Ben
小红 | Anna
小刚 | Jack
小丽 | Emma
小华 | Peter
小芳 | Alice
小军 | David
小兰 | Nora
小强 | Oscar
小梅 | Lily
小龙 | Henry
小雪 | Clara
""")
PLACES = table("""
公园 | the park
图书馆 | the library
市场 | the market
车站 | the station
海边 | the beach
博物馆 | the museum
医院 | the hospital
动物园 | the zoo
机场 | the airport
邮局 | the post office
湖边 | the lake
广场 | the square
""")
DEEDS = table("""
拍了一张照片 | took a photo
画了一幅画 | painted a picture
读了一份报纸 | read a newspaper
写了一封信 | wrote a letter
喝了一杯茶 | drank a cup of tea
吃了一个面包 | ate some bread
遇见了一位老朋友 | met an old friend
丢了一把雨伞 | lost an umbrella
找到了一把钥匙 | found a key
买了一顶帽子 | bought a hat
唱了一首歌 | sang a song
讲了一个故事 | told a story
""")
# When they set out | what else there was | how the day went on: what a summary leaves out
TIMES = table("""
星期六上午 | On Saturday morning
昨天下午 | Yesterday afternoon
放学以后 | After school
午饭以后 | After lunch
天刚亮 | At daybreak
一个晴天 | One sunny day
""")
SURROUNDINGS = table("""
路上人很多。 | There were many people on the way.
天上飘着几朵云。 | A few clouds were in the sky.
外面刮着风。 | The wind was blowing.
门口坐着一只猫。 | A cat sat by the door.
天气不冷也不热。 | It was neither cold nor warm.
四周非常安静。 | All was very quiet.
""")
AFTERWARDS = table("""
天黑以前大家都回了家。 | Everyone was home before dark.
回家的路上下起了雨。 | It rained on the way home.
这一天过得很愉快。 | It was a happy day.
晚上全家都听说了这件事。 | In the evening the family heard about it.
时间过得真快。 | The time went by quickly.
后来灯都亮了。 | Later the lights went on.
""")
